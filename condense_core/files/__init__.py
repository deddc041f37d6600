"""What every file format of this project shares: written whole or not at all, headers that may be hostile."""
