"""A host and its VMs, as a file describes them: what is in it, and the life of what it starts."""
