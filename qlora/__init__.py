"""What the two scripts are made of: one noun a file, no script imported here."""
