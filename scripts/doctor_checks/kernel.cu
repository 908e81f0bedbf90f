/* What nvcc must be able to compile, for the doctor. */
__global__ void add(float *numbers) { numbers[threadIdx.x] += 1; }
