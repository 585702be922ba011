"""The package's one warning category, so that users can filter or escalate it."""


class EmpFastWarning(UserWarning):
    """Something was handled but the user should know, such as a fallback or refused values."""
