"""Stateless gradient compressors: bit packing, a wire format, and nothing of processes, optimizers or models."""

if __name__ == "compression":  # Python 3.14 has a package of this name; a checkout's root on sys.path must not hide it
    import sysconfig

    __path__ = [sysconfig.get_path("stdlib") + "/compression"]
else:
    from gradwire.compression.base import Compressor, Part, Payload
    from gradwire.compression.block_quantize import BlockQuantize
    from gradwire.compression.cast import Cast
    from gradwire.compression.chain import Chain
    from gradwire.compression.chunk_topk import ChunkTopK
    from gradwire.compression.dct_topk import DCTTopK
    from gradwire.compression.identity import Identity
    from gradwire.compression.random_k import RandomK
    from gradwire.compression.scaled_sign import ScaledSign
    from gradwire.compression.topk import TopK
    from gradwire.compression.wire import PayloadError, from_bytes, to_bytes

    __all__ = [
        "BlockQuantize",
        "Cast",
        "Chain",
        "ChunkTopK",
        "Compressor",
        "DCTTopK",
        "Identity",
        "Part",
        "Payload",
        "PayloadError",
        "RandomK",
        "ScaledSign",
        "TopK",
        "from_bytes",
        "to_bytes",
    ]
