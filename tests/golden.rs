//! Golden batches: results that another implementation computed in float64 by automatic differentiation, and files
//! that are wrong.

use std::collections::HashMap;
use std::path::Path;

use catalog_softmax::{Backend, Cpu, DType, Reference};
use safetensors::Dtype;
use safetensors::tensor::TensorView;

use catalog_softmax_testing::golden::Golden;
use catalog_softmax_testing::golden_check::{Precision, judge, results};
use catalog_softmax_testing::golden_files::files;

#[test]
fn reference_agrees_with_every_golden_batch() {
    check_all(&mut Reference::new(), Precision::Float64);
}

#[test]
fn cpu_agrees_with_every_golden_batch_as_closely_as_f32_can() {
    check_all(&mut Cpu::new(), Precision::Single { operands: DType::F32 });
}

fn check_all<B: Backend>(backend: &mut B, precision: Precision) {
    let of = |folder: &str| files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests").join(folder));
    let (plain, over_a_table) = (of("golden"), of("golden2"));
    assert!(plain.len() >= 15 && over_a_table.len() >= 30, "{} and {}", plain.len(), over_a_table.len());
    let files = [plain, over_a_table].concat();
    let mut failures = Vec::new();
    for path in &files {
        let golden = Golden::load(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        assert!(golden.expected.len() >= 5, "{} expects too little", path.display());
        let output = golden.problem.batch().and_then(|batch| backend.value_and_grad(&batch, &golden.problem.loss));
        let output = output.unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        let verdicts = judge(&golden, &results(&output.into()), precision);
        failures.extend(verdicts.into_iter().filter(|v| !v.passes()).map(|v| format!("{}: {v:?}", path.display())));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn bad_files_give_errors() {
    type Edit = fn(&mut Parts);
    let cases: [(&str, Edit); 37] = [
        ("tensor queries is missing", |parts| parts.remove("queries")),
        ("tensor positives is missing", |parts| parts.remove("positives")),
        ("tensor queries has type F64; rule: F32, F16 or BF16", |parts| parts.set("queries", Dtype::F64, &[2, 2])),
        ("tensor queries has shape [2, 0]", |parts| parts.set("queries", Dtype::F32, &[2, 0])),
        ("tensor candidates has shape [6]; rule: two axes", |parts| parts.set("candidates", Dtype::F32, &[6])),
        ("tensor candidates has dim 3", |parts| parts.set("candidates", Dtype::F32, &[2, 3])),
        ("tensor log_q has type F64", |parts| parts.set("log_q", Dtype::F64, &[3])),
        ("tensor positives has type I32", |parts| parts.set("positives", Dtype::I32, &[2])),
        ("exclude_offsets or exclude_ids is missing", |parts| parts.set("exclude_ids", Dtype::I64, &[1])),
        ("tensor candidate_id has a name", |parts| parts.set("candidate_id", Dtype::I64, &[3])),
        ("expected.lse has shape [3]; rule: [2]", |parts| parts.set("expected.lse", Dtype::F64, &[3])),
        ("metadata similarity is \"cosin\"", |parts| parts.option("similarity", "cosin")),
        ("metadata temperature is \"warm\"", |parts| parts.option("temperature", "warm")),
        ("metadata reductoin is not a known key", |parts| parts.option("reductoin", "sum")),
        ("metadata loss is missing", |parts| drop(parts.options.remove("loss"))),
        ("tensor table is missing", |parts| parts.set("candidate_rows", Dtype::I64, &[3])),
        ("tensor table is missing", |parts| parts.set("row_negatives", Dtype::I64, &[2, 1])),
        ("tensor candidates has a table beside it", |parts| parts.set("table", Dtype::F32, &[5, 2])),
        ("tensor candidate_ids has a table beside it", |parts| {
            parts.over_a_table();
            parts.set("candidate_ids", Dtype::I64, &[5]);
        }),
        ("tensor table has dim 3", |parts| {
            parts.over_a_table();
            parts.set("table", Dtype::F32, &[5, 3]);
        }),
        ("tensor table has type F64", |parts| {
            parts.over_a_table();
            parts.set("table", Dtype::F64, &[5, 2]);
        }),
        ("tensor candidate_rows has type I32", |parts| {
            parts.over_a_table();
            parts.set("candidate_rows", Dtype::I32, &[4]);
        }),
        ("tensor candidate_rows has -1 in row 0", |parts| {
            parts.over_a_table();
            parts.fill("candidate_rows", 0xff);
        }),
        ("tensor row_negatives has type I64 and shape [6]", |parts| {
            parts.over_a_table();
            parts.set("row_negatives", Dtype::I64, &[6]);
        }),
        ("tensor row_negatives has type U32", |parts| {
            parts.over_a_table();
            parts.set("row_negatives", Dtype::U32, &[2, 3]);
        }),
        ("tensor row_negatives has -2 at element 0", |parts| {
            parts.over_a_table();
            parts.fill("row_negatives", 0xff);
            parts.tensors.iter_mut().filter(|tensor| tensor.0 == "row_negatives").for_each(|tensor| tensor.3[0] = 0xfe);
        }),
        ("tensor row_negatives has 4294967295 at element 0", |parts| {
            parts.over_a_table();
            parts
                .tensors
                .iter_mut()
                .filter(|tensor| tensor.0 == "row_negatives")
                .for_each(|tensor| tensor.3[..4].fill(0xff));
        }),
        ("tensor row_negatives_log_q has type F32 and shape [2, 2]", |parts| {
            parts.over_a_table();
            parts.set("row_negatives_log_q", Dtype::F32, &[2, 2]);
        }),
        ("tensor row_negatives is missing", |parts| parts.set("row_negatives_log_q", Dtype::F32, &[2, 3])),
        ("tensor log_q has no pool", |parts| {
            parts.over_a_table();
            parts.remove("candidate_rows");
            parts.set("log_q", Dtype::F32, &[5]);
        }),
        ("tensor positive_offsets has type I32", |parts| parts.set("positive_offsets", Dtype::I32, &[3])),
        ("tensor positive_weight has type F64", |parts| parts.set("positive_weight", Dtype::F64, &[2])),
        ("expected.d_table has no table beside it", |parts| parts.set("expected.d_table", Dtype::F64, &[3, 2])),
        ("expected.d_candidates has a table beside it", |parts| {
            parts.over_a_table();
            parts.set("expected.d_candidates", Dtype::F64, &[4, 2]);
        }),
        ("expected.d_table has shape [4, 2]; rule: [5, 2]", |parts| {
            parts.over_a_table();
            parts.set("expected.d_table", Dtype::F64, &[4, 2]);
        }),
        ("metadata false_negative_margin is \"some\"; rule: a number", |parts| {
            parts.option("false_negative_margin", "some");
        }),
        ("metadata false_negative_ratio is 2; rule: one of", |parts| {
            parts.option("false_negative_ratio", "2.0");
            parts.option("false_negative_margin", "0.1");
        }),
    ];
    Golden::from_bytes(&Parts::good().file()).map(drop).expect("the file that the cases spoil is good");
    let mut over_a_table = Parts::good();
    over_a_table.over_a_table();
    Golden::from_bytes(&over_a_table.file()).map(drop).expect("the file that the cases spoil is good");
    for (message, edit) in cases {
        let mut parts = Parts::good();
        edit(&mut parts);
        let error = Golden::from_bytes(&parts.file()).map(drop).expect_err(message).to_string();
        assert!(error.contains(message), "{error:?} is no {message:?}");
    }
    let whole = Parts::good().file();
    for len in [0, 7, 8, whole.len() / 2, whole.len() - 1] {
        assert!(Golden::from_bytes(&whole[..len]).is_err(), "{len} of {} bytes", whole.len());
    }
}

#[test]
fn an_index_that_is_negative_gives_an_error() {
    let mut parts = Parts::good();
    parts.set("positives", Dtype::I64, &[2]);
    parts.tensors.iter_mut().filter(|tensor| tensor.0 == "positives").for_each(|tensor| tensor.3.fill(0xff));
    let error = Golden::from_bytes(&parts.file()).map(drop).expect_err("-1").to_string();
    assert!(error.contains("tensor positives has -1 in row 0"), "{error}");
}

/// A golden file in the making: 2 queries, 3 candidates, all zeros.
struct Parts {
    tensors: Vec<(String, Dtype, Vec<usize>, Vec<u8>)>,
    options: HashMap<String, String>,
}

impl Parts {
    fn good() -> Parts {
        let options = [("similarity", "cosine"), ("temperature", "0.1"), ("loss", "softmax")];
        let options = options.map(|(key, value)| (key.to_string(), value.to_string())).into();
        let mut parts = Parts { tensors: Vec::new(), options };
        parts.set("queries", Dtype::F32, &[2, 2]);
        parts.set("candidates", Dtype::F32, &[3, 2]);
        parts.set("positives", Dtype::I64, &[2]);
        parts
    }

    fn remove(&mut self, name: &str) {
        self.tensors.retain(|tensor| tensor.0 != name);
    }

    fn set(&mut self, name: &str, dtype: Dtype, shape: &[usize]) {
        self.remove(name);
        let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
        self.tensors.push((name.into(), dtype, shape.to_vec(), vec![0; bytes]));
    }

    /// Replaces the candidates by a table of 5 items: a pool of 4 of its rows, 3 negatives of each query's own.
    fn over_a_table(&mut self) {
        self.remove("candidates");
        self.set("table", Dtype::F32, &[5, 2]);
        self.set("candidate_rows", Dtype::I64, &[4]);
        self.set("row_negatives", Dtype::I64, &[2, 3]);
    }

    fn fill(&mut self, name: &str, byte: u8) {
        self.tensors.iter_mut().filter(|tensor| tensor.0 == name).for_each(|tensor| tensor.3.fill(byte));
    }

    fn option(&mut self, key: &str, value: &str) {
        self.options.insert(key.into(), value.into());
    }

    fn file(&self) -> Vec<u8> {
        let views = self.tensors.iter().map(|(name, dtype, shape, bytes)| {
            (name, TensorView::new(*dtype, shape.clone(), bytes).expect("as many bytes as the shape says"))
        });
        safetensors::serialize(views, Some(self.options.clone())).expect("names and shapes are plain")
    }
}

#[test]
fn golden_files_keep_their_element_type() {
    use catalog_softmax_testing::problem::Storage;
    let mut parts = Parts::good();
    for (dtype, name) in [(Dtype::F16, "F16"), (Dtype::BF16, "Bf16"), (Dtype::F32, "F32")] {
        parts.set("queries", dtype, &[2, 2]);
        parts.set("candidates", dtype, &[3, 2]);
        let golden = Golden::from_bytes(&parts.file()).map_err(|error| error.to_string()).unwrap();
        let found = match golden.problem.queries {
            Storage::F32(_) => "F32",
            Storage::F16(_) => "F16",
            Storage::Bf16(_) => "Bf16",
        };
        assert_eq!(found, name);
    }
}

#[test]
fn golden_files_are_written_as_they_are_read() {
    use catalog_softmax_testing::golden_files::to_bytes;
    for path in files(&Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden2")) {
        let read = Golden::load(&path).expect("a golden batch");
        let again = Golden::from_bytes(&to_bytes(&read).expect("a file")).expect("what was written");
        assert_eq!(format!("{:?}", read.problem), format!("{:?}", again.problem), "{}", path.display());
        assert_eq!(read.expected, again.expected, "{}", path.display());
    }
}

/// Nothing over a table is compared so loosely that a wrong element passes.
#[test]
fn a_wrong_element_is_bad_over_a_table() {
    for name in ["everything_logq", "several_row_logq", "both_uncorrected"] {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden2").join(name).with_extension("safetensors");
        let golden = Golden::load(&path).expect("a golden batch");
        let batch = golden.problem.batch().expect("a valid batch");
        let output = Cpu::new().value_and_grad(&batch, &golden.problem.loss).expect("a loss that fits");
        let right = results(&output.into());
        for result in golden.expected.keys() {
            let mut found = right.clone();
            let values = &mut found.get_mut(result).expect("found").values;
            let largest = values.iter().fold(0.0, |max: f64, value| max.max(value.abs()));
            let at = values.iter().position(|value| value.abs() == largest).expect("the largest is there");
            values[at] += if *result == "num_negatives" { 1.0 } else { 1e-3 * largest };
            let verdicts = judge(&golden, &found, Precision::Single { operands: DType::F32 });
            let bad: Vec<_> = verdicts.iter().filter(|verdict| !verdict.passes()).map(|verdict| verdict.name).collect();
            assert_eq!(bad, [*result], "{name}");
        }
    }
}
