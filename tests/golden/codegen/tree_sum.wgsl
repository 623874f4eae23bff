@group(0) @binding(0) var<storage, read> A: array<f32>;
@group(0) @binding(1) var<storage, read_write> Y: array<f32>;
struct Dims { rows: i32 }
@group(0) @binding(2) var<uniform> dims: Dims;
var<workgroup> s: array<f32, 64>;

@compute @workgroup_size(64, 1, 1)
fn main(@builtin(workgroup_id) wg: vec3<u32>, @builtin(local_invocation_id) lid: vec3<u32>) {
  let rows = dims.rows;
  let b_gy = i32(wg.y);
  let t2 = (b_gy * 65535i);
  let b_gx = i32(wg.x);
  let b_g = (b_gx + t2);
  if ((b_g < rows)) {
    let b = b_g;
    let t3 = (b * 64i);
    let t = i32(lid.x);
    s[t] = A[(t + t3)];
    workgroupBarrier();
    if ((t < 32i)) {
      s[t] = (s[t] + s[(t + 32i)]);
    }
    workgroupBarrier();
    if ((t < 16i)) {
      s[t] = (s[t] + s[(t + 16i)]);
    }
    workgroupBarrier();
    if ((t < 8i)) {
      s[t] = (s[t] + s[(t + 8i)]);
    }
    workgroupBarrier();
    if ((t < 4i)) {
      s[t] = (s[t] + s[(t + 4i)]);
    }
    workgroupBarrier();
    if ((t < 2i)) {
      s[t] = (s[t] + s[(t + 2i)]);
    }
    workgroupBarrier();
    if ((t < 1i)) {
      s[t] = (s[t] + s[(t + 1i)]);
    }
    workgroupBarrier();
    if ((t == 0i)) {
      Y[b] = s[0i];
    }
  }
}
