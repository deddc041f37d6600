"""What asks miners: a client that believes nothing it has not checked, and who is there to be asked."""
