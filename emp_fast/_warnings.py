"""The package's one warning category, so that users can filter or escalate it."""


class EmpFastWarning(UserWarning):
    """Something was handled, and the user should know: a fallback, refused values."""
