"""Transforms are read as ITK reads them; maps are brought to a common space as computed by hand."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest

from esegeta_monai.errors import InputError, UsageError
from esegeta_monai.output.cohort.maps import Volume
from esegeta_monai.output.cohort.space import CommonSpace, Moments, given_transforms, warped
from esegeta_monai.output.cohort.transforms import read_transform

itk = pytest.importorskip("itk")
POINTS = np.random.default_rng(0).uniform(-20, 20, (7, 3))


def affine():
    transform = itk.AffineTransform[itk.D, 3].New()
    transform.SetMatrix(itk.matrix_from_array(np.array([[1.1, 0.2, 0.0], [-0.1, 0.9, 0.3], [0.05, 0.0, 1.2]])))
    transform.SetTranslation([3.0, -2.0, 5.0])
    transform.SetCenter([10.0, 20.0, -5.0])
    return transform


def field(folder, intent=1007):
    """A displacement field with an oblique grid, as ITK writes it; the file and ITK's own transform of it."""
    random = np.random.default_rng(1)
    values = random.uniform(-3, 3, (9, 10, 11, 3)).astype(np.float32)  # z, y, x
    image = itk.image_from_array(values, is_vector=True)
    image.SetSpacing([5.0, 6.0, 7.0])
    image.SetOrigin([-22.0, -27.0, -30.0])
    turn = np.deg2rad(20)
    image.SetDirection(
        itk.matrix_from_array(
            np.array([[np.cos(turn), -np.sin(turn), 0], [np.sin(turn), np.cos(turn), 0], [0, 0, 1.0]])
        )
    )
    path = folder / "warp.nii.gz"
    itk.imwrite(image, str(path))
    if intent != 1007:
        stored = nib.load(path)
        stored.header["intent_code"] = intent
        nib.save(stored, path)
    double = itk.image_from_array(values.astype(np.float64), is_vector=True)
    for name in ("Spacing", "Origin", "Direction"):
        getattr(double, f"Set{name}")(getattr(image, f"Get{name}")())
    transform = itk.DisplacementFieldTransform[itk.D, 3].New()
    transform.SetDisplacementField(double)
    return path, transform


def by_itk(transform, points):
    return np.array([list(transform.TransformPoint(p.tolist())) for p in points])


@pytest.mark.parametrize("end", [".txt", ".tfm", ".mat", ".h5"])
def test_affine_files_are_read_as_itk_reads_them(tmp_path, end):
    path = tmp_path / f"a{end}"
    itk.transformwrite([affine()], str(path))
    np.testing.assert_allclose(read_transform(path)(POINTS), by_itk(affine(), POINTS), rtol=0, atol=1e-10)


def test_the_affine_of_ants_is_read(tmp_path):
    """ANTs writes MatrixOffsetTransformBase into a file of MATLAB 4."""
    a = affine()
    numbers = np.array(list(a.GetParameters()))[:, None]
    content = {"MatrixOffsetTransformBase_double_3_3": numbers, "fixed": np.array([[10.0], [20.0], [-5.0]])}
    with open(tmp_path / "a.mat", "wb") as file:  # scipy's writer shortens such names
        for name, values in content.items():
            data = np.asarray(values, dtype="<f8")
            file.write(np.array([0, *data.shape, 0, len(name) + 1], dtype="<i4").tobytes())
            file.write(name.encode() + b"\0" + data.tobytes())
    np.testing.assert_allclose(read_transform(tmp_path / "a.mat")(POINTS), by_itk(a, POINTS), rtol=0, atol=1e-10)


def test_displacement_field(tmp_path):
    path, transform = field(tmp_path)
    inside = POINTS / 2
    ours = read_transform(path)(inside)
    assert np.abs(ours - inside).max() > 1
    np.testing.assert_allclose(ours, by_itk(transform, inside), rtol=0, atol=1e-5)
    far = np.array([[500.0, 0, 0]])
    np.testing.assert_array_equal(read_transform(path)(far), far)


def test_displacements_in_ras_have_their_own_intent(tmp_path):
    """Intent 1006 means displacements in RAS mm, which ITK converts on reading."""
    path, _ = field(tmp_path, intent=1006)
    image = itk.imread(str(path), itk.Vector[itk.F, 3])
    double = itk.image_from_array(itk.array_from_image(image).astype(np.float64), is_vector=True)
    for name in ("Spacing", "Origin", "Direction"):
        getattr(double, f"Set{name}")(getattr(image, f"Get{name}")())
    transform = itk.DisplacementFieldTransform[itk.D, 3].New()
    transform.SetDisplacementField(double)
    np.testing.assert_allclose(read_transform(path)(POINTS / 2), by_itk(transform, POINTS / 2), rtol=0, atol=1e-5)


def test_a_chain_applies_the_last_file_first(tmp_path):
    path, warp = field(tmp_path)
    itk.transformwrite([affine()], str(tmp_path / "a.mat"))
    reference = tmp_path / "r.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3), np.float32), np.eye(4)), reference)
    space = CommonSpace.read(str(reference), [f"p={path},{tmp_path / 'a.mat'}"], ["p"])
    both = by_itk(warp, by_itk(affine(), POINTS / 4))
    np.testing.assert_allclose(space.transforms["p"](POINTS / 4), both, rtol=0, atol=1e-5)


def test_a_composite_transform_in_h5(tmp_path):
    _, warp = field(tmp_path)
    both = itk.CompositeTransform[itk.D, 3].New()
    both.AddTransform(affine())
    both.AddTransform(warp)
    itk.transformwrite([both], str(tmp_path / "c.h5"))
    np.testing.assert_allclose(
        read_transform(tmp_path / "c.h5")(POINTS / 2), by_itk(both, POINTS / 2), rtol=0, atol=1e-5
    )


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"hello", "no transform of ITK"),
        ("a.txt", b"\xff\xfe\x00", "no text"),
        ("a.mat", b"MATLAB 5.0", r"cannot be read|version 4"),
        ("a.xfm", b"", "a transform is"),
        ("a.h5", b"none", "cannot be read by ITK"),
        ("b.txt", None, "no such file"),
    ],
)
def test_damaged_files_are_named(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_transform(tmp_path / name)


@pytest.mark.parametrize("numbers", ["0 0 0 0 0 0 0 0 0 1 2 3", "nan 0 0 0 1 0 0 0 1 0 0 0", "1 0 0"])
def test_singular_and_incomplete_matrices_are_refused(tmp_path, numbers):
    text = "#Insight Transform File V1.0\n#Transform 0\nTransform: AffineTransform_double_3_3\n"
    (tmp_path / "a.txt").write_text(f"{text}Parameters: {numbers}\nFixedParameters: 0 0 0\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"singular|no affine transform"):
        read_transform(tmp_path / "a.txt")


def test_a_field_without_an_intent_is_refused(tmp_path):
    nib.save(nib.Nifti1Image(np.zeros((3, 3, 3, 1, 3), np.float32), np.eye(4)), tmp_path / "f.nii.gz")
    with pytest.raises(InputError, match="intent of vectors"):
        read_transform(tmp_path / "f.nii.gz")


def test_files_of_a_folder_belong_to_the_longest_name(tmp_path):
    for name in ("a_0GenericAffine.mat", "a_1Warp.nii.gz", "a_1InverseWarp.nii.gz", "a_b.txt", "ab.txt", "a.b.tfm"):
        (tmp_path / name).touch()
    given = given_transforms([str(tmp_path)], ["a", "a_b", "ab", "c"])
    names = {case: [p.name for p in paths] for case, paths in given.items()}
    assert names["a_b"] == ["a_b.txt"]
    assert names["ab"] == ["ab.txt"]
    assert "c" not in names


def test_ambiguous_files_are_refused(tmp_path):
    for name in ("a_1.txt", "a_2.txt"):
        (tmp_path / name).touch()
    with pytest.raises(UsageError, match="several files for a"):
        given_transforms([str(tmp_path)], ["a"])
    with pytest.raises(UsageError, match="give a folder"):
        given_transforms(["nonsense"], ["a"])


# -- maps --------------------------------------------------------------------------------------------------------------


def space_of(tmp_path, shape, matrix, transform):
    path = tmp_path / "reference.nii.gz"
    nib.save(nib.Nifti1Image(np.zeros(shape, np.float32), matrix), path)
    space = CommonSpace.read(str(path), ["identity"], ["p"])
    space.transforms["p"] = transform
    return space


def lps(matrix):
    """A transform of RAS mm, (4, 4), as one of points in LPS mm."""
    turn = np.diag([-1.0, -1.0, 1.0, 1.0])
    m = turn @ matrix @ turn
    return lambda points: points @ m[:3, :3].T + m[:3, 3]


@pytest.mark.parametrize("shape", [(8, 7, 6), (8, 7, 1)])
def test_mean_and_variance_by_hand(tmp_path, shape):
    """Two cases: one shifted by whole voxels, one with twice as small voxels and mirrored; the mean by hand."""
    random = np.random.default_rng(2)
    first = np.zeros(shape)
    first[2:6, 2:5] = random.normal(size=first[2:6, 2:5].shape)
    shift = np.eye(4)
    shift[:3, 3] = [2, -1, 0]
    expected_first = np.roll(first, (-2, 1), (0, 1)) / np.abs(first).sum()
    fine_shape = (16, 14, 1 if shape[2] == 1 else 12)
    fine = random.normal(size=fine_shape)
    half = 1.0 if shape[2] == 1 else 0.5
    affine = np.diag([0.5, 0.5, half, 1.0])
    affine[:3, 3] = [-0.25, -0.25, 0.0 if shape[2] == 1 else -0.25]
    mirror = np.diag([-1.0, 1.0, 1.0, 1.0])
    mirror[0, 3] = shape[0] - 1
    blocks = fine.reshape(8, 2, 7, 2, *((1, 1) if shape[2] == 1 else (6, 2))).sum((1, 3, 5))
    expected_second = blocks[::-1] / np.abs(fine).sum()

    one = warped(Volume(first, np.eye(4)), space_of(tmp_path, shape, np.eye(4), None), lps(shift))
    two = warped(Volume(fine, affine), space_of(tmp_path, shape, np.eye(4), None), lps(mirror))
    np.testing.assert_allclose(one[0], expected_first, rtol=0, atol=1e-12)
    np.testing.assert_allclose(two[0], expected_second, rtol=0, atol=1e-12)
    assert two[1].all()
    moments = Moments.of([one, two], shape)
    both = np.stack([expected_first, expected_second])
    covered = one[1]
    assert 0 < covered.sum() < covered.size  # the shift leaves two planes uncovered, which do not count as zeros
    np.testing.assert_allclose(moments.mean[covered], both.mean(0)[covered], rtol=0, atol=1e-12)
    np.testing.assert_allclose(moments.variance[covered], both.var(0, ddof=1)[covered], rtol=0, atol=1e-12)
    np.testing.assert_allclose(moments.mean[~covered], expected_second[~covered], rtol=0, atol=1e-12)


def test_a_warp_keeps_the_sum(tmp_path):
    """A smooth warp that shrinks the object to 0.64 along each axis: a finer reference brings the sum nearer to 1."""
    index = np.indices((24, 24, 24))
    values = np.exp(-((index - 11.5) ** 2).sum(0) / 12)
    errors = []
    for spacing in (1.0, 0.5):
        matrix = np.diag([spacing, spacing, spacing, 1.0])
        space = space_of(tmp_path, (round(24 / spacing),) * 3, matrix, None)
        shares, _ = warped(Volume(values, np.eye(4)), space, lambda points: points + 1.5 * np.sin(points / 4))
        errors.append(abs(shares.sum() - 1))
    assert errors[0] < 0.02  # without the determinant the sum is 3.8 or 0.26
    assert errors[1] < errors[0] / 3
