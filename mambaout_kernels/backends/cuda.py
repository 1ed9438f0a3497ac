"""placeholder"""


def unavailable():
    return "not built yet"
