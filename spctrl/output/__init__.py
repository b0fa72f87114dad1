"""What is printed: text that cannot act on a terminal, and no secrets."""
