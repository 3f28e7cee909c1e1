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
    from gradwire.compression.dare import DARE
    from gradwire.compression.darex import DAREx
    from gradwire.compression.dct_topk import DCTTopK
    from gradwire.compression.identity import Identity
    from gradwire.compression.natural_compression import NaturalCompression
    from gradwire.compression.qsgd import QSGD
    from gradwire.compression.random_dithering import RandomDithering
    from gradwire.compression.random_k import RandomK
    from gradwire.compression.scaled import Scaled
    from gradwire.compression.scaled_sign import ScaledSign
    from gradwire.compression.terngrad import TernGrad
    from gradwire.compression.threshold_topk import ThresholdTopK
    from gradwire.compression.topk import TopK
    from gradwire.compression.wire import PayloadError, from_bytes, to_bytes

    __all__ = [
        "DARE",
        "QSGD",
        "BlockQuantize",
        "Cast",
        "Chain",
        "ChunkTopK",
        "Compressor",
        "DAREx",
        "DCTTopK",
        "Identity",
        "NaturalCompression",
        "Part",
        "Payload",
        "PayloadError",
        "RandomDithering",
        "RandomK",
        "Scaled",
        "ScaledSign",
        "TernGrad",
        "ThresholdTopK",
        "TopK",
        "from_bytes",
        "to_bytes",
    ]
