"""The stacks without Django: one Starlette application, on what each module says."""
