"""What is decided when a guest does something sensitive.

Source: SDM 3C, "VM Exits", for what is sensitive; the answers are this hypervisor's own.
"""
