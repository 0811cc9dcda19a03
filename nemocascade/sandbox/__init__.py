"""Untrusted programs: the sandbox, confined grader processes, and the Python tool."""
