"""What a person reads: the report of a plan, runs side by side."""
