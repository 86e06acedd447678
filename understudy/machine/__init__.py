"""What a physical machine and a virtual one have both: memory, frames, a bus.

Source: lecture, "Virtual machines": a virtual machine is a duplicate of a real one.
"""
