"""What `inspect_data` shows: counts, tables, a page of every token."""
