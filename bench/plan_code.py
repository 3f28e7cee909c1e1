"""A configuration as the lines of Python that a user pastes."""

import ast

from gradwire.bench import specs
from gradwire.bench.plan_measure import PLAIN

_MODULES = {"compressor": "compression", "feedback": "comm", "exchange": "comm", "communicator": "comm", "plan": "comm"}


def lines(method: str) -> tuple[str, str, str]:
    """Three lines that attach a method to `model` and `optimizer`, which exist.

    Raises:
        UsageError: The text is wrong.

    Example:
        >>> print(*lines("ChunkTopK(k=32) + EF"), sep=chr(10))
        from gradwire import comm, compression
        communicator = comm.Communicator(compression.ChunkTopK(k=32), feedback=comm.EF())
        comm.attach(model, communicator, optimizer=optimizer)
    """
    if method == PLAIN:
        return (
            "from torch.nn.parallel import DistributedDataParallel",
            "",
            "model = DistributedDataParallel(model)",
        )
    terms = specs.parse(method).terms
    written = {family: _Qualified().visit(term) for family, term in terms.items() if family != "optimizer"}
    texts = {family: ast.unparse(_called(term)) for family, term in written.items()}
    if "communicator" in texts:
        made = texts["communicator"]
    else:
        others = [f"{family}={text}" for family, text in texts.items() if family != "compressor"]
        made = f"comm.Communicator({', '.join([texts['compressor'], *others])})"
    return (
        "from gradwire import comm, compression" if "compression." in made else "from gradwire import comm",
        f"communicator = {made}",
        "comm.attach(model, communicator, optimizer=optimizer)",
    )


class _Qualified(ast.NodeTransformer):
    """Names of classes with their modules in front, and called."""

    def visit_Call(self, node: ast.Call) -> ast.expr:
        assert isinstance(node.func, ast.Name)
        keywords = [ast.keyword(word.arg, self.visit(word.value)) for word in node.keywords]
        return ast.Call(_qualified(node.func), [self.visit(arg) for arg in node.args], keywords)

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return _called(_qualified(node))


def _qualified(node: ast.Name) -> ast.expr:
    for family, classes in specs.catalogue().items():
        for name in classes:
            if family in _MODULES and name.lower() == node.id.lower():
                return ast.Attribute(ast.Name(_MODULES[family], ast.Load()), name, ast.Load())
    return node


def _called(node: ast.expr) -> ast.expr:
    return node if isinstance(node, ast.Call) or not isinstance(node, ast.Attribute) else ast.Call(node, [], [])
