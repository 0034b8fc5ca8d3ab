"""Small random models quantized, and the weights that they then stand for."""

from jlayer.checkpoint.layout import read_manifest
from jlayer.convert import convert_checkpoint
from jlayer.convert.transform.packed import dequantize
from jlayer.convert.transform.quantize import quantize
from tests.convert.checkpoints import edit_tensors, numbers, tensor_of
from tests.tiny import tiny_llama


def converted(folder, scheme, **options):
    """A random model quantized, and the source with the weights that this stands for."""
    source = tiny_llama(folder / "source", hidden_size=54, intermediate_size=141, **options)
    convert_checkpoint(source, folder / "layered", quantize=scheme)
    return source, folder / "layered"


def stand_for(source, layered):
    """Overwrites a source's matrices with what they were quantized to."""
    choice = read_manifest(layered).quantization

    def change(tensors):
        for name, tensor in tensors.items():
            scheme = choice.scheme_of(name, tensor[1])
            if scheme:
                pieces = quantize(numbers(tensor), scheme)
                found = dequantize(scheme, *pieces.values(), width=tensor[1][1])
                tensors[name] = tensor_of(found)

    edit_tensors(source / "model.safetensors", change)
