"""What a gateway is made of: which miners it asks for an application, what it believes, and whom it lets ask."""
