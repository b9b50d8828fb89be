use super::super::tensor_map::{TensorMap, TensorMapRequest};

fn request<'a>(
    dims: &'a [u64],
    strides: &'a [u64],
    boxes: &'a [u32],
    ones: &'a [u32],
    swizzle: u32,
) -> TensorMapRequest<'a> {
    TensorMapRequest {
        data_type: 1,
        rank: dims.len() as u32,
        global_address: 4096,
        global_dim: dims,
        global_strides: strides,
        box_dim: boxes,
        element_strides: ones,
        interleave: 0,
        swizzle,
        l2_promotion: 0,
        oob_fill: 0,
    }
}

/// Global memory in which the u16 at address 4096 + 2 i holds i.
fn read(address: u64, out: &mut [u8]) -> Result<(), String> {
    for (i, b) in out.iter_mut().enumerate() {
        let at = address + i as u64 - 4096;
        *b = (at / 2).to_le_bytes()[(at % 2) as usize];
    }
    Ok(())
}

/// Loads a box into `memory`, which starts at shared address 0.
fn load(map: &TensorMap, start: &[i32], shared: u32, memory: &mut [u8]) {
    let rows = map.load(start, &mut read).unwrap();
    assert_eq!(rows.len() as u32, map.box_bytes());
    map.scatter(shared, &rows, &mut memory[shared as usize..]);
}

fn word(memory: &[u8], at: u32) -> u16 {
    u16::from_le_bytes([memory[at as usize], memory[at as usize + 1]])
}

#[test]
fn maps_survive_their_bytes() {
    let map =
        TensorMap::encode_tiled(&request(&[100, 1 << 32, 3], &[208, (1 << 40) - 16], &[64, 256, 2], &[1, 2, 1], 3))
            .unwrap();
    assert_eq!(TensorMap::from_bytes(&map.to_bytes()).unwrap(), map);
    assert!(TensorMap::from_bytes(&[0; 128]).is_err());
}

#[test]
fn bad_requests_are_refused() {
    let good = request(&[64, 32], &[128], &[64, 8], &[1, 1], 3);
    assert!(TensorMap::encode_tiled(&good).is_ok());
    assert!(TensorMap::encode_tiled(&TensorMapRequest { global_address: 4104, ..good.clone() }).is_err());
    assert!(TensorMap::encode_tiled(&TensorMapRequest { global_strides: &[130], ..good.clone() }).is_err());
    assert!(TensorMap::encode_tiled(&TensorMapRequest { box_dim: &[65, 8], ..good.clone() }).is_err());
    assert!(TensorMap::encode_tiled(&TensorMapRequest { box_dim: &[64, 257], ..good.clone() }).is_err());
    assert!(TensorMap::encode_tiled(&TensorMapRequest { box_dim: &[128, 8], ..good.clone() }).is_err());
    assert!(TensorMap::encode_tiled(&TensorMapRequest { oob_fill: 1, ..good.clone() }).is_err());
    assert!(TensorMap::encode_tiled(&TensorMapRequest { element_strides: &[1, 9], ..good.clone() }).is_err());
}

#[test]
fn a_box_lands_swizzled_and_comes_back() {
    for (swizzle, inner) in [(0, 64), (1, 16), (2, 32), (3, 64)] {
        let boxes = [inner, 16];
        let map = TensorMap::encode_tiled(&request(&[128, 64], &[256], &boxes, &[1, 1], swizzle)).unwrap();
        let mut memory = vec![0u8; 8192];
        load(&map, &[32, 5], 1024, &mut memory);
        assert_eq!(map.box_bytes(), inner * 16 * 2);
        for row in 0..16 {
            for column in 0..inner {
                let at = map.swizzle.apply(1024 + (row * inner + column) * 2);
                assert_eq!(word(&memory, at), ((5 + row) * 128 + 32 + column) as u16);
            }
        }
        for (address, bytes) in map.gather(&[32, 5], 1024, &memory[1024..]) {
            let mut expected = vec![0u8; bytes.len()];
            read(address, &mut expected).unwrap();
            assert_eq!(bytes, expected);
        }
    }
}

#[test]
fn out_of_bounds_elements_are_filled_and_never_stored() {
    let dims = [20u64, 10];
    let base = request(&dims, &[48], &[16, 8], &[1, 1], 0);
    for (kind, fill) in [(1u32, 0u16), (9, 0x7fff)] {
        let map = TensorMap::encode_tiled(&TensorMapRequest {
            data_type: kind,
            oob_fill: (fill != 0) as u32,
            ..base.clone()
        })
        .unwrap();
        for start in [[-3, -2], [12, 6], [0, 0], [40, 0], [4, -8], [-16, 0], [19, 9]] {
            let mut memory = vec![0x55u8; 4096];
            load(&map, &start, 256, &mut memory);
            let mut inside = 0;
            for row in 0..8 {
                for column in 0..16 {
                    let (x, y) = (start[0] + column, start[1] + row);
                    let ok = (0..20).contains(&x) && (0..10).contains(&y);
                    inside += ok as usize;
                    let expected = if ok { (y * 24 + x) as u16 } else { fill };
                    assert_eq!(
                        word(&memory, 256 + (row * 16 + column) as u32 * 2),
                        expected,
                        "{start:?} {row} {column}"
                    );
                }
            }
            let stored: usize = map.gather(&start, 256, &memory[256..]).iter().map(|r| r.1.len()).sum();
            assert_eq!(stored, inside * 2);
        }
    }
}

#[test]
fn element_strides_skip_rows() {
    let map = TensorMap::encode_tiled(&request(&[16, 64, 4], &[32, 2048], &[16, 7, 2], &[1, 3, 1], 0)).unwrap();
    assert_eq!(map.counts(), [16, 3, 2, 1, 1]);
    let mut memory = vec![0u8; 1024];
    load(&map, &[0, 2, 1], 0, &mut memory);
    assert_eq!(map.box_bytes(), 16 * 3 * 2 * 2);
    for plane in 0..2 {
        for row in 0..3 {
            let expected = (1 + plane) * 1024 + (2 + 3 * row) * 16;
            assert_eq!(word(&memory, (plane * 3 + row) * 32), expected as u16);
        }
    }
}

#[test]
fn copies_need_alignment() {
    let map = TensorMap::encode_tiled(&request(&[64, 64], &[128], &[64, 16], &[1, 1], 3)).unwrap();
    assert!(map.check(64).is_err());
    assert!(map.check(128).is_ok());
}
