"""A key: the name of an object in a store. It says what is a key, and never touches one."""

from phema_dist.errors import SettingsError


def checked(key: str) -> str:
    """Return the key, if it names something below the store: relative, no empty or hidden parts, no `..`.

    Raises:
        SettingsError: it does not.
    """
    if not key or key[0] in "./" or key[-1] == "/" or "/." in key or "//" in key:
        raise SettingsError(f"a key is a relative name, no part of it empty or beginning with a dot; got {key!r}.")
    return key
