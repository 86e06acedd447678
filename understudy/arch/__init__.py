"""The manual as types: bit layouts and encodings of the x86 architecture, without behavior."""
