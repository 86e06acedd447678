"""More memory than there is: who gives, how much, and by which means; one idea a file."""
