import pytest
import torch

from minisiss.data.digits import bundled_digits
from minisiss.data.training_set import to_float
from minisiss.errors import UserError
from minisiss.metrics.classifier import BUNDLED_CLASSIFIER, FORMAT, DigitClassifier, classify, load_classifier
from minisiss.study.train_classifier import BATCH_SIZE, LEAST_ACCURACY, SHIFT, save, shift, train

LABELS = torch.arange(10).repeat_interleave(1000)  # of the bundled digits, which are in the order of the classes


def test_shift_moves_whole_images_and_fills_with_background():
    images = torch.full((400, 1, 28, 28), -1.0)
    images[:, 0, 10, 20] = 1.0
    moved = shift(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and moved.unique().tolist() == [-1, 1]
    at = (moved[:, 0] == 1).nonzero()
    assert at[:, 0].tolist() == list(range(400))
    offsets = {(y - 10, x - 20) for _, y, x in at.tolist()}
    assert offsets == {(dy, dx) for dy in range(-SHIFT, SHIFT + 1) for dx in range(-SHIFT, SHIFT + 1)}


def test_training_learns_digits_it_has_not_seen():
    digits = bundled_digits()
    classifier = train(digits[::4], LABELS[::4], epochs=2)
    assert not classifier.training
    _, probabilities = classify(classifier, to_float(digits[1::20]))
    assert (probabilities.argmax(dim=1) == LABELS[1::20]).float().mean() > 0.85


def test_training_is_a_function_of_the_seed():
    digits, labels = bundled_digits()[::50], LABELS[::50]  # 200: a batch, and a rest that is left out
    assert len(digits) > BATCH_SIZE
    first, again, other = (train(digits, labels, epochs=2, seed=seed).head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_classify_in_batches_is_the_classifier_itself():
    torch.manual_seed(0)
    classifier = DigitClassifier().eval()
    images = torch.rand(7, 1, 28, 28) * 2 - 1
    features, probabilities = classify(classifier, images, batch_size=3)
    assert features.shape == (7, 128) and torch.allclose(features, classifier.features(images), atol=1e-6)
    assert torch.allclose(probabilities, classifier(images).softmax(dim=1), atol=1e-6)


def test_a_saved_classifier_comes_back_frozen_and_small(tmp_path):
    torch.manual_seed(0)
    classifier = DigitClassifier().to(memory_format=torch.channels_last)
    classifier(torch.rand(4, 1, 28, 28))  # moves the running means of the normalization
    classifier.eval()
    reference = torch.rand(128, dtype=torch.float64), torch.rand(128, 128, dtype=torch.float64)
    save(tmp_path / "c.pt", classifier, reference, 0.5, {"seed": 0})
    assert [path.name for path in tmp_path.iterdir()] == ["c.pt"] and (tmp_path / "c.pt").stat().st_size < 1e6
    (loaded, found), images = load_classifier(tmp_path / "c.pt"), torch.rand(3, 1, 28, 28)
    assert all(torch.allclose(ours, theirs.to(ours.dtype)) for ours, theirs in zip(found, reference, strict=True))
    assert torch.allclose(loaded(images), classifier(images), atol=1e-6)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())


ANOTHER = {"format": "another", "weights": DigitClassifier().state_dict()}


@pytest.mark.parametrize("state", [None, b"junk", [1], ANOTHER, {"format": FORMAT, "weights": {}}])
def test_a_file_that_holds_no_classifier_is_named_in_one_line(tmp_path, state):
    path = tmp_path / "c.pt"
    if isinstance(state, bytes):
        path.write_bytes(state)
    elif state is not None:
        torch.save(state, path)
    with pytest.raises(UserError, match="c.pt: no readable digit classifier") as caught:
        load_classifier(path)
    assert "\n" not in str(caught.value)


def test_the_bundled_classifier_is_small_and_good():
    assert BUNDLED_CLASSIFIER.stat().st_size < 1e6
    state = torch.load(BUNDLED_CLASSIFIER, weights_only=True)
    assert state["accuracy"] >= LEAST_ACCURACY and state["made_by"]["command"]
    _, probabilities = classify(load_classifier()[0], to_float(bundled_digits()[::10]))
    assert (probabilities.argmax(dim=1) == LABELS[::10]).float().mean() >= LEAST_ACCURACY
