extern "C" __global__ void __launch_bounds__(64) kernel_tree_sum(const float* __restrict__ A, float* __restrict__ Y, long long rows) {
  const long long b = (int)blockIdx.x;
  __shared__ float s[64];
  const long long t1 = (b * 64);
  const int t = (int)threadIdx.x;
  s[t] = A[(t + t1)];
  __syncthreads();
  if ((t < 32)) {
    s[t] = (s[t] + s[(t + 32)]);
  }
  __syncthreads();
  if ((t < 16)) {
    s[t] = (s[t] + s[(t + 16)]);
  }
  __syncthreads();
  if ((t < 8)) {
    s[t] = (s[t] + s[(t + 8)]);
  }
  __syncthreads();
  if ((t < 4)) {
    s[t] = (s[t] + s[(t + 4)]);
  }
  __syncthreads();
  if ((t < 2)) {
    s[t] = (s[t] + s[(t + 2)]);
  }
  __syncthreads();
  if ((t < 1)) {
    s[t] = (s[t] + s[(t + 1)]);
  }
  __syncthreads();
  if ((t == 0)) {
    Y[b] = s[0];
  }
}
