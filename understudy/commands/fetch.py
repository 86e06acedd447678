"""`understudy fetch`."""
