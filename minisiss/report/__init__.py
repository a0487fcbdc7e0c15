"""What a run shows: tables, pictures, the comparison of runs."""
