"""The plugins of this repository, beyond what the kit asks of anyone's."""
