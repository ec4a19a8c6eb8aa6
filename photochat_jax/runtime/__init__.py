"""What a process does around the step: joining others, stopping, watching."""
