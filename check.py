"""Stub."""


def check_all(args):
    pass


def check_briefly(args, say):
    pass


def describe_shortfall(annotations):
    return ""
