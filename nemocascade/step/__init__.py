"""Pure training steps. A step gets the model as a scoring function and does not depend on nemocascade.model."""
