"""The commands, one file each, and the files that they share. Only here are stages put in order."""
