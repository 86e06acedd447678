"""What both halves must agree on: the data sheet and the machine, the manual in two languages."""
