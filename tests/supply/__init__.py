"""What is done to the repository, and not by the package: hashes, licences, the parts list, releases. Run by make."""
