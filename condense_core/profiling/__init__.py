"""What compression costs on this machine: times by stage, memory, and how far from the machine's own limits."""
