"""Private helpers below every other room: errors, value checks, validation, compilation, untrusted files, aliases."""

__all__: list[str] = []
