"""One instruction, carried out in the guest's stead: operands, arithmetic, strings, task switches.

Source: SDM 2, the instructions' own pages; SDM 3A, "Task Switching".
"""
