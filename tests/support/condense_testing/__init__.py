"""What tests share: helpers that are imported by name. Fixtures stand in the conftest.py of their folder."""
