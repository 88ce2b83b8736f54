"""One file a paper: what each of its tables trains and claims."""
