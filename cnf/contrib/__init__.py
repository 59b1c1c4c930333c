"""Bridges to other packages: sbi, Pyro and the hub; each module needs its package, and nothing else imports them."""

__all__: list[str] = []
