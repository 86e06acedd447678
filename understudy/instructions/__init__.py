"""One instruction, carried out in the guest's stead; one file for each group of the manual's.

`interpreter` makes a plan of one whose only memory is its operand: wherever that lies (a device, a
page table, RAM).  What reaches more (stacks, strings, tables of descriptors) goes by linear
addresses, and is for who interprets a whole guest; `registers` says what each is given.

Source: SDM 2, the instructions' own pages; SDM 3A, "Task Switching".
"""
