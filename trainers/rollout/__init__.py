"""What is sampled, and how it is kept, compared and read again."""
