"""The command line, and what is checked and written around the method: nothing here is the paper's."""
