"""What is done in a guest through its agent: commands, and files.

The agent makes system calls for the host (docs/decisions/0059-*); what they are for is decided
here.  What all others use of it is `understudy.linux_session`.
"""
