"""Files that the libraries themselves write; skipped where one is not installed (extra `neighbours`)."""

import numpy as np
import pytest

import kfacerr
from kfacerr.stored import find_factors
from kfacerr.stored_files import read_tree

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.filterwarnings("ignore")  # theirs

torch.manual_seed(0)
X, Y = torch.randn(64, 12), torch.randint(0, 4, (64,))
DATA = torch.utils.data.TensorDataset(X, Y)


def network() -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Linear(12, 10), torch.nn.ReLU(), torch.nn.Linear(10, 4))


def inputs(bias: bool) -> list[np.ndarray]:
    """The columns of A of both layers: what comes in, with a 1 for the bias."""
    model = network()
    columns = [X, torch.relu(model[0](X))]
    if bias:
        columns = [torch.cat([x, torch.ones(64, 1)], dim=1) for x in columns]
    return [x.detach().double().numpy().T for x in columns]


def gradients() -> list[np.ndarray]:
    """The columns of G of both layers, of the sum of the losses."""
    model, outputs = network(), []
    hidden = model[0](X)
    outputs = [hidden, model[2](torch.relu(hidden))]
    loss = torch.nn.functional.cross_entropy(outputs[1], Y, reduction="sum")
    return [g.double().numpy().T for g in torch.autograd.grad(loss, outputs)]


def found(path) -> dict:
    return {(factor.layer, factor.side): factor for factor in find_factors(read_tree(path))}


def assert_mean(factor, columns: np.ndarray) -> None:
    M = factor.array.read() / (factor.count or 1)
    expected = columns @ columns.T / columns.shape[1]
    assert np.allclose(M, expected, rtol=1e-4, atol=1e-6 * np.trace(expected))


def test_kronfluence(tmp_path):
    pytest.importorskip("kronfluence")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    class Classification(Task):
        def compute_train_loss(self, batch, model, sample=False):
            return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")

        def compute_measurement(self, batch, model):
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self):
            return ["0", "2"]

    task = Classification()
    analyzer = Analyzer("a", prepare_model(network(), task), task, cpu=True, output_dir=str(tmp_path))
    arguments = FactorArguments(use_empirical_fisher=True, covariance_data_partitions=2)
    analyzer.fit_all_factors("ekfac", DATA, factor_args=arguments, per_device_batch_size=16)
    factors = found(tmp_path / "a" / "factors_ekfac")
    assert list(factors) == [("0", "A"), ("0", "G"), ("2", "A"), ("2", "G")]
    for layer, a, g in zip("02", inputs(bias=True), gradients(), strict=True):
        assert_mean(factors[layer, "A"], a)
        assert_mean(factors[layer, "G"], g)
        assert factors[layer, "A"].count == 64
    audit = kfacerr.inspect(tmp_path / "a", rank=4)
    assert (audit.table.basis < 1e-5).all()  # its eigenvectors are eigenvectors


def test_curvlinops(tmp_path):
    curvlinops = pytest.importorskip("curvlinops")
    model = network()
    operator = curvlinops.KFACLinearOperator(
        model,
        torch.nn.CrossEntropyLoss(),
        list(model.parameters()),
        [(X, Y)],
        fisher_type="empirical",
        check_deterministic=False,
    )
    operator.compute_kronecker_factors()
    torch.save(operator.state_dict(), tmp_path / "state.pt")
    factors = found(tmp_path / "state.pt")
    assert set(factors) == {("0", "A"), ("0", "G"), ("2", "A"), ("2", "G")}
    for layer, a in zip("02", inputs(bias=False), strict=True):
        assert_mean(factors[layer, "A"], a)


def test_laplace(tmp_path):
    laplace = pytest.importorskip("laplace")
    posterior = laplace.Laplace(network(), "classification", hessian_structure="kron", subset_of_weights="all")
    posterior.fit(torch.utils.data.DataLoader(DATA, batch_size=64))
    torch.save(posterior.state_dict(), tmp_path / "state.pt")
    factors = found(tmp_path / "state.pt")
    assert list(factors) == [("0", "G"), ("0", "A"), ("1", "G"), ("2", "G"), ("2", "A"), ("3", "G")]
    for layer, a in zip("02", inputs(bias=False), strict=True):
        M = factors[layer, "A"].array.read()
        assert np.allclose(M / np.trace(M), (a @ a.T) / np.sum(a * a), atol=1e-5)


@pytest.mark.parametrize("name", ["SOAP", "Shampoo"])
def test_optimizers(name, tmp_path):
    optimizers = pytest.importorskip("pytorch_optimizer")
    model = network()
    optimizer = getattr(optimizers, name)(model.parameters(), lr=1e-3)
    grads = []
    for batch in range(2):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(X[batch::2]), Y[batch::2]).backward()
        grads.append(model[0].weight.grad.double().numpy().copy())
        optimizer.step()
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    factors = found(tmp_path / "state.pt")
    for side, of in (("L", lambda g: g @ g.T), ("R", lambda g: g.T @ g)):
        M = factors["0", side].array.read().astype(float)
        span = np.stack([of(g).ravel() for g in grads] + [np.eye(len(M)).ravel()], axis=1)
        residual = np.linalg.lstsq(span, M.ravel(), rcond=None)[1]
        assert residual.size == 0 or residual[0] < 1e-8 * np.sum(M * M)  # a sum of what it should be
    assert kfacerr.inspect(tmp_path / "state.pt").steps["layer"].nunique() == 2
