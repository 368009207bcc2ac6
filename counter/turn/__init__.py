"""What is read and answered together in one turn of the loop, many frames at a time."""
