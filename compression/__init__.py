"""Stateless gradient compressors: bit packing, a wire format, and nothing of processes, optimizers or models."""

if __name__ == "compression":  # Python 3.14 has a package of this name; a checkout's root on sys.path must not hide it
    import sysconfig

    __path__ = [sysconfig.get_path("stdlib") + "/compression"]
else:
    from gradwire.compression.base import Compressor, Part, Payload
    from gradwire.compression.identity import Identity

    __all__ = ["Compressor", "Identity", "Part", "Payload"]
