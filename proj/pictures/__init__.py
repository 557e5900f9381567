"""Makes the pictures of the order desk, for README.md and docs/demo.md."""
