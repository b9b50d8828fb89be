//! The structs of `params.rs` against the headers of the kernels, read as text.

use std::collections::HashMap;
use std::path::Path;

use super::*;

/// A struct that a header has, too.
pub(super) trait Mirrored {
    const NAME: &'static str;
    fn fields() -> Vec<(&'static str, usize, usize)>;
}

/// What the headers define: structs by name, and constants.
#[derive(Default)]
struct Headers {
    structs: HashMap<String, Struct>,
    constants: HashMap<String, u32>,
}

struct Struct {
    fields: Vec<(String, usize, usize)>,
    size: usize,
    align: usize,
}

impl Headers {
    /// All of `kernels/`, those first that others include.
    fn read() -> Headers {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels");
        let entries = |folder: &Path| std::fs::read_dir(folder).expect("a folder of kernels").flatten();
        let folders = entries(&folder).map(|entry| entry.path()).filter(|path| path.is_dir());
        let mut paths: Vec<_> = folders.flat_map(|folder| entries(&folder).map(|entry| entry.path())).collect();
        paths.retain(|path| path.extension().is_some_and(|extension| extension == "h"));
        let mut texts: Vec<String> =
            paths.iter().map(|path| std::fs::read_to_string(path).expect("a header can be read")).collect();
        texts.sort_by_key(|text| text.matches("#include \"").count());
        let mut headers = Headers::default();
        // Twice: a header may include one that comes later in this order.
        for text in texts.iter().chain(&texts) {
            headers.add(text);
        }
        headers
    }

    fn add(&mut self, text: &str) {
        let lines = text.lines().map(|line| line.split("//").next().unwrap_or_default());
        let text = lines.collect::<Vec<_>>().join(" ");
        for part in text.split("constexpr ").skip(1) {
            // Others are functions, or computed.
            let constant = part.split_once(';').and_then(|(line, _)| line.split_once(" = "));
            if let Some((name, value)) =
                constant.and_then(|(name, value)| Some((name.split_once(' ')?.1, value.parse().ok()?)))
            {
                self.constants.insert(name.to_owned(), value);
            }
        }
        for part in text.split("struct ").skip(1) {
            let Some((head, body)) = part.split_once('{') else { continue };
            let (alignment, name) = match head.trim().strip_prefix("alignas(") {
                Some(rest) => {
                    rest.split_once(") ").map(|(n, name)| (n.parse().expect("a number"), name)).expect("a name")
                }
                None => (1, head.trim()),
            };
            if let Some(layout) = self.lay_out(alignment, body) {
                self.structs.insert(name.trim().to_owned(), layout);
            }
        }
    }

    /// The natural layout of the fields before the closing brace; nothing where a type is not known yet.
    fn lay_out(&self, alignment: usize, body: &str) -> Option<Struct> {
        // Of a union the first member counts.
        let mut body = body.to_owned();
        while let Some(start) = body.find("union {") {
            let end = start + body[start..].find('}').expect("a union ends");
            let first = body[start + "union {".len()..].split(';').next().expect("a union has members").to_owned();
            body.replace_range(start..=end, &first);
        }
        let mut layout = Struct { fields: Vec::new(), size: 0, align: alignment };
        for declaration in body.split('}').next()?.split(';').map(str::trim).filter(|text| !text.is_empty()) {
            let (of, name) = declaration.rsplit_once(' ')?;
            let (name, count) = match name.strip_suffix(']').and_then(|name| name.split_once('[')) {
                Some((name, count)) => (name, count.parse().ok().or(self.constants.get(count).map(|&n| n as usize))?),
                None => (name, 1),
            };
            let (size, align) = self.size_of(of)?;
            let offset = layout.size.next_multiple_of(align);
            layout.fields.push((name.to_owned(), offset, size * count));
            layout.size = offset + size * count;
            layout.align = layout.align.max(align);
        }
        layout.size = layout.size.next_multiple_of(layout.align);
        Some(layout)
    }

    fn size_of(&self, of: &str) -> Option<(usize, usize)> {
        match of {
            _ if of.ends_with('*') => Some((8, 8)),
            "uint64_t" | "double" => Some((8, 8)),
            "uint32_t" | "float" => Some((4, 4)),
            name => self.structs.get(name).map(|known| (known.size, known.align)),
        }
    }

    fn check<T: Mirrored>(&self) {
        let header = self.structs.get(T::NAME).unwrap_or_else(|| panic!("no header has {}", T::NAME));
        let found: Vec<_> = header.fields.iter().map(|(name, offset, size)| (name.as_str(), *offset, *size)).collect();
        assert_eq!(found, T::fields(), "{}", T::NAME);
        assert_eq!((header.size, header.align), (size_of::<T>(), align_of::<T>()), "{}", T::NAME);
    }
}

#[test]
fn structs_are_those_of_the_headers() {
    let headers = Headers::read();
    headers.check::<KeyTable>();
    headers.check::<RowSet>();
    headers.check::<PrepareRowsParams>();
    headers.check::<PlacePositivesParams>();
    headers.check::<FindHitsParams>();
    headers.check::<StreamParams>();
    headers.check::<TopKParams>();
    headers.check::<MergeTopKParams>();
    headers.check::<HopperParams>();
    headers.check::<WideParams>();
    headers.check::<Splits>();
    headers.check::<StatisticsParams>();
    headers.check::<ExpectedParams>();
    headers.check::<EpilogueParams>();
    headers.check::<QueryGradientParams>();
    headers.check::<FinishRowsParams>();
    headers.check::<TotalsParams>();
    headers.check::<FinishGradientParams>();
    headers.check::<SymmetricParams>();
    headers.check::<EnqueueParams>();
    headers.check::<BoundsParams>();
    headers.check::<OwnNegatives>();
    headers.check::<OwnNegativesParams>();
    headers.check::<Uses>();
    headers.check::<FinishTableParams>();
    headers.check::<CheckRowsParams>();
    headers.check::<PlaceRowsParams>();
    headers.check::<ListUsesParams>();
    headers.check::<SortUsesParams>();
}

#[test]
fn constants_are_those_of_the_headers() {
    let headers = Headers::read();
    for (name, value) in [
        ("HELD", HELD),
        ("USE_BITS", USE_BITS),
        ("SORT_TILE", SORT_TILE),
        ("SEGMENT", SEGMENT),
        ("USES_OF_WARP", USES_OF_WARP),
        ("OUTPUT_PLAIN", OUTPUT_PLAIN),
        ("OUTPUT_FOLDED", OUTPUT_FOLDED),
        ("CORRECTION_NONE", CORRECTION_NONE),
        ("CORRECTION_LOG_Q", CORRECTION_LOG_Q),
        ("CORRECTION_CORRECTED", CORRECTION_CORRECTED),
        ("REDUCTION_SUM", REDUCTION_SUM),
        ("REDUCTION_MEAN", REDUCTION_MEAN),
        ("REDUCTION_WEIGHTED_MEAN", REDUCTION_WEIGHTED_MEAN),
    ] {
        assert_eq!(headers.constants.get(name), Some(&value), "{name}");
    }
    for (name, bytes) in [
        ("RowTerm", ROW_TERM),
        ("ColumnTerm", COLUMN_TERM),
        ("PositiveTerm", POSITIVE_TERM),
        ("Hits", HITS),
        ("RowsOfKey", ROWS_OF_KEY),
    ] {
        assert_eq!(headers.structs[name].size, bytes, "{name}");
    }
}
