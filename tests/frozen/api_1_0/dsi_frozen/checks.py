"""A check of the conformance kit."""

from dsi.testing import failed, passed


def same_class(subject):
    """The layers of the optimized model are instances of the stock layer's class."""
    twins = subject.twins()
    classes = {f"{type(one).__module__}:{type(one).__qualname__}" for one in twins.containers}
    layers = {block.layer for block in subject.policy.blocks}
    if not classes or not classes <= layers:
        return failed("a class changed", measured=classes, allowed=layers, mend="report it to dsi")
    return passed("classes are stock's", measured=len(twins.containers), allowed=len(twins.containers))
