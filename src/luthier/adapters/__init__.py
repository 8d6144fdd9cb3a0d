"""What is trained: small matrices beside frozen linear layers, and their files."""
